"""Accuracy, latency and environment of sessions: what a row says, and the contract it was taken under (each row's `contract`; `harness` writes it)."""

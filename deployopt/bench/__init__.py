"""Accuracy, latency and environment of sessions: what a row says, and the contract it was taken under (measurement contract in the README)."""

"""What also runs on a device: standard library + NumPy (+ Pillow for images), Python 3.8 syntax. Imports only `errors`."""

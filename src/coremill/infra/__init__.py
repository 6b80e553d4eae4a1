"""The machine and its packages: measured compatibility, the version gate, interpreters and devices."""

"""What the machine and its packages can do: compatibility cells, the version gate, interpreters, the doctor."""

"""The student: its architecture, its checkpoint format and the one decoding loop."""

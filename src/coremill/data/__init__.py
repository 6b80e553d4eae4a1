"""What a model is asked, and who answers: datasets, grammars, teachers, corpora and prompts. Imports no torch."""

"""llama.cpp through the shared library of the `xllamacpp` package: inference, quantisation and chat templates."""

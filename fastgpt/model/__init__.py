"""The model under the book's names: its modules, the whole of it, its cache and its generation."""

"""The file of models and the file of keys, read, checked and compared."""

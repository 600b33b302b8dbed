"""Pure functions of tensors, one folder an operation: ``reference.py`` is the definition, the rest is speed."""

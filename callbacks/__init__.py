"""Lightning callbacks: when things happen. Formulas live in the layers below."""

if __name__ != "ds_lightning.callbacks":
    raise ImportError(f"imported as {__name__!r}: write 'from ds_lightning.callbacks import ...'")

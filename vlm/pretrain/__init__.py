"""The pretraining of the built-in model on drawn lines of text."""

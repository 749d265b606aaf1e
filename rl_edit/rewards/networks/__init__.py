"""Networks that compare images, for the terms that use them. None is a language model."""

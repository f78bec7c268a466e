"""Template and data of the model cards, installed as `flashkat_hf.model_cards`."""

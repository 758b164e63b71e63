"""The method in formulas: spectrum, blocks, update. Knows neither PEFT nor transformers."""

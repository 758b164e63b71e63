"""A first config for a model and data: what `smoa init` looks at, chooses, measures and writes."""

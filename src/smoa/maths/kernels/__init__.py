"""Forward and backward of an adapted layer, of which no tensor of W's size is kept."""

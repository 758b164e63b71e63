"""Methods against each other, tuned alike."""

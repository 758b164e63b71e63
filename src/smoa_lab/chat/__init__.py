"""Talks to an adapted model: what ``smoa chat`` does apart from the terminal."""

"""Stores and students as others get them: cards, folders for the Hub, uploads, imports."""

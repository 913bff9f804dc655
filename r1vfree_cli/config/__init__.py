"""Recipes: the typed schema, finding and overriding, TRL's keys. No torch. Imports core."""

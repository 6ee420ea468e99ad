"""Our models beside other people's: the tables of docs/reference-models.md. The wheel does not have it."""

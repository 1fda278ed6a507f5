"""Provider wire <-> canonical types, one file per provider. The engine is unknown here."""

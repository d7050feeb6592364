"""Models: loading, building, and the facts about them (`DiffusionSpec`) that objectives and samplers need."""

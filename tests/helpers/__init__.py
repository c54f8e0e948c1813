"""What tests share: models, slow references, harnesses."""

"""What a model is made of: the parts that the families have in common."""

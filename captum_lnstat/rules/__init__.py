"""The rules, one a file: ways from a traced forward pass to relevance on the patch grid."""

"""Text: files to documents, documents to tokens, tokens to bytes and words."""

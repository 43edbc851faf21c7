"""`tiue-export serve`: a bundle behind the OpenAI images API."""

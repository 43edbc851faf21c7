"""What the server and the studio share: where they listen, whom they answer, how they end."""

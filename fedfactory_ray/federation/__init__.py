"""The one round: clients train modules where their images are, and upload each of them once."""

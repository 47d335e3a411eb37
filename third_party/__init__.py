"""Assets made by others: where they come from, their licences and hashes."""

"""What an attribution gives: scores, mixtures, models without data."""

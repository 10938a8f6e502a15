"""Exact modular unlearning: a finished run becomes one in which a client never took part, with a certificate."""

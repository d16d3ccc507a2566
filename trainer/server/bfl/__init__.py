"""What BFL's protocol is made of beside its routes."""

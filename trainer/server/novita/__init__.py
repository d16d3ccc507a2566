"""What Novita's protocol is made of beside its routes."""

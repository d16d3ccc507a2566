"""A local engine for image personalisation that speaks the hosted trainers' languages."""

__version__ = "0.1.0"

"""`campaign`: everything worth doing on a borrowed GPU, in a time box. Needs a checkout."""

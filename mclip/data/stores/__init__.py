"""What stages wrote: one reader and one writer a format."""

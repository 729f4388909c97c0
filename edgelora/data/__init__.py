"""From a user's file to rows that train, rows that select and rows that report."""

"""Reports for people: pages, tables and plots."""

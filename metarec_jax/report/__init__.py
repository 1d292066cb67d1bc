"""What a person reads of a report: pages, tables and plots."""

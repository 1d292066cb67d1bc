"""Several devices and processes: placement of arrays, communication, limits of memory."""

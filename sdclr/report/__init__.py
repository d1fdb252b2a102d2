"""What people look at: console, metrics, figures, pages."""

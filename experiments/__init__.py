"""The demo, and one file for each figure or table. The core never imports this package."""

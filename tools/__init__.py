"""What makes environments, the site and the like; nothing of the library needs it."""

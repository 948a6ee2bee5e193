"""What `gearshift doctor` looks at."""

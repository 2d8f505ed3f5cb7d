"""Pictures of generation: films for the browser and the page, and a live view in the terminal."""

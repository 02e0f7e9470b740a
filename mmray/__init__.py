"""mmray labels image archives: one small multimodal model, trained and run on Ray."""

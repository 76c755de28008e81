"""The library inside of trainers: Lightning's and Hugging Face's, and what they log."""

"""What each kernel can reach at best, by its machine code: `gate bound`. See README.md."""

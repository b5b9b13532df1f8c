"""Reproductions: one file per paper, its claim and number beside ours."""

"""Who runs a study's jobs: this process, or workers side by side on Ray"""

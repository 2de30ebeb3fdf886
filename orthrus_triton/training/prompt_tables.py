"""Words that `prompts_builtin` combines into prompts: phrasings, tasks and subjects, all our own."""

from __future__ import annotations

CODE_PHRASINGS = (
    *("Write a Python function that {}.",) * 3,  # how most people put it
    "Write a function in Python that {}.",
    "Implement a Python function which {}.",
    "Create a Python function that {}.",
    "Can you write Python code that {}?",
    "Please write a Python function that {}, with a short docstring.",
    "I need a Python function that {}. Show an example call.",
    "Write a short Python program that {}.",
    "Give me a Python function that {}.",
    "Show me how to write a Python function that {}.",
    "Define a Python function that {}.",
    "How do I write a Python function that {}?",
    "Write a well documented Python function that {}.",
)
OTHER_LANGUAGE_PHRASING = "Write a {} function that {}."
OTHER_LANGUAGES = ("JavaScript", "Java", "C", "C++", "Go", "Rust", "SQL", "Bash")
OTHER_LANGUAGE_SHARE = 0.08

CHAT_PHRASINGS = (
    "Explain {} in simple words.",
    "What is {}?",
    "Give me five facts about {}.",
    "Why is {} important?",
    "Write a short paragraph about {}.",
    "Tell a child about {}.",
    "List three questions about {} and answer them.",
    "Summarise what people should know about {}.",
    "How does one get started with {}?",
    "What are common mistakes people make about {}?",
    "Write an email to a friend about {}.",
    "Give me some advice that has to do with {}.",
    "What should a beginner know about {}?",
    "What are the advantages and disadvantages of {}?",
    "Suggest three titles for a book about {}.",
    "How would you introduce {} to someone who has never heard of it?",
    "What is surprising about {}?",
    "Describe {} with the help of an example.",
    "Make a plan for a lesson on {}.",
    "Write a short conversation between two people about {}.",
    "Which three words belong to {}? Explain them.",
    "Write an advertisement that mentions {}.",
    "What can go wrong with {}?",
    "How has {} changed over time?",
    "Imagine a world without {}. What is different?",
    "Write a poem about {}.",
    "Write a short story in which {} matters.",
    "Compare {} with something similar.",
    "Answer a sceptic who sees no use in {}.",
    "What would you put on a poster about {}?",
    "List the steps of a small project about {}.",
    "Rank five things about {} by how much they matter.",
)
NOUN_PHRASINGS = ("Explain what {} is.", "What is {} used for?", "Describe {} in two sentences.")

# docstrings begin with the verb, prompts need its third person
VERBS = (
    "add apply build calculate check compare compute construct convert copy count create decode delete determine draw "
    "encode evaluate expand extract find format generate get insert iterate join list load make merge open parse "
    "perform print produce read reduce remove replace return rotate search select set simplify solve sort split test "
    "transform validate write yield"
).split()

SEQUENCES = (
    "a list of integers", "a list of strings", "a list of numbers", "a nested list", "a tuple", "a list of tuples",
    "a list of words", "an array", "a list of floats",
)  # fmt: skip
SEQUENCE_TASKS = (
    "returns the largest element of {}", "returns the smallest element of {}", "removes duplicates from {}",
    "returns the second largest value in {}", "reverses {}", "counts how often each element occurs in {}",
    "sorts {} without using sorted", "checks whether {} is sorted", "splits {} into chunks of size n",
    "rotates {} by k places", "returns the most common element of {}", "finds the median of {}",
    "returns the sum of {}", "returns every second element of {}", "flattens {}", "shuffles {}",
    "finds the index of the first match in {}", "prints {} one item per line", "filters {} by a condition",
    "computes the average of {}", "returns all pairs from {}", "removes empty items from {}",
    "finds the longest item in {}", "groups {} by first letter", "saves {} to a file",
    "partitions {} into even and odd", "computes the running total of {}", "checks if {} contains a value",
    "swaps the first and last element of {}", "returns the length of {} without using len", "merges {} into one",
    "finds the common elements in {}",
)  # fmt: skip

TEXTS = ("a string", "a sentence", "a given text", "a line of text")
TEXT_TASKS = (
    "counts the vowels in {}", "counts the words in {}", "capitalizes each word of {}", "removes punctuation from {}",
    "checks for a palindrome in {}", "finds the longest word in {}", "replaces spaces with dashes in {}",
    "reverses the words of {}", "counts the uppercase letters in {}", "removes all digits from {}",
    "checks whether only digits occur in {}", "returns the first repeated character of {}",
    "encodes {} with a Caesar cipher", "compresses {} with run length encoding",
    "extracts all email addresses from {}", "extracts all numbers from {}", "converts {} to snake case",
    "converts {} to title case", "counts the lines of {}", "finds all substrings of {}",
    "returns the most frequent character of {}", "removes the vowels from {}", "swaps upper and lower case in {}",
    "checks whether brackets are balanced in {}", "removes extra whitespace from {}", "checks for anagrams in {}",
    "truncates {} to a given length", "centers {} within a given width",
)  # fmt: skip

NUMBER_KINDS = (
    "prime", "even", "odd", "perfect", "Fibonacci", "triangular", "square", "palindromic", "Armstrong", "happy",
    "divisible by three", "negative", "composite",
)  # fmt: skip
NUMBER_TASKS = (
    "checks whether a number is {}", "returns the first n {} numbers", "prints all {} numbers up to n",
    "counts the {} numbers in a list", "sums all {} numbers below n",
)  # fmt: skip

SINGLE_TASKS = (
    "computes the factorial of n", "computes the factorial of n recursively",
    "returns the greatest common divisor of two numbers", "returns the least common multiple of two numbers",
    "converts Celsius to Fahrenheit", "converts Fahrenheit to Celsius", "converts a decimal number to binary",
    "converts a binary string to an integer", "converts an integer to Roman numerals", "computes compound interest",
    "computes the area of a circle", "computes the area of a triangle", "computes the distance between two points",
    "solves a quadratic equation", "computes the power of a number without the ** operator",
    "computes the digits sum of a number", "reverses the digits of an integer", "generates a random password",
    "generates a multiplication table", "simulates rolling two dice", "simulates flipping a coin n times",
    "draws a pyramid of stars", "plays rock paper scissors", "guesses a number between 1 and 100",
    "converts seconds to hours, minutes and seconds", "computes the number of days between two dates",
    "checks whether a year is a leap year", "validates an email address",
    "validates a credit card number with the Luhn algorithm", "validates a password",
    "reads a CSV file and returns its rows", "reads a JSON file and prints its keys",
    "writes a list of dictionaries to a CSV file", "counts the lines of a file", "copies a file",
    "renames all files in a folder", "finds all files with a given extension", "downloads a web page",
    "parses command line arguments", "measures the running time of a function", "retries a function three times",
    "caches the results of a function", "implements binary search", "implements linear search",
    "implements bubble sort", "implements insertion sort", "implements selection sort", "implements quick sort",
    "implements heap sort", "implements counting sort", "implements a stack with push and pop",
    "implements a queue using two stacks", "implements a linked list", "reverses a linked list",
    "inserts a node into a binary search tree", "traverses a binary tree in order",
    "computes the height of a binary tree", "performs breadth first search on a graph",
    "performs depth first search on a graph", "finds the shortest path with Dijkstra's algorithm",
    "detects a cycle in a graph", "solves the knapsack problem", "finds the longest common subsequence",
    "computes the edit distance of two strings", "generates all permutations of a list",
    "generates all subsets of a set", "solves the Tower of Hanoi", "solves the N queens problem",
    "multiplies two matrices", "transposes a matrix", "computes the determinant of a matrix",
    "computes the dot product of two vectors", "normalizes a vector", "computes the standard deviation of a list",
    "computes the mean and variance of a list", "converts a list to a dictionary", "inverts a dictionary",
    "merges two dictionaries", "sorts a dictionary by value", "sorts a list of dictionaries by a key",
    "zips two lists into a dictionary", "finds missing numbers in a sequence",
    "finds two numbers that add up to a target", "finds the maximum subarray sum",
    "moves all zeros to the end of a list", "returns the union of two lists", "returns the difference of two lists",
    "checks if two lists are equal", "prints the current date and time", "logs messages to a file",
    "greets the user by name", "adds two numbers", "subtracts two numbers", "swaps two variables",
    "computes the body mass index", "converts miles to kilometers", "converts kilograms to pounds",
    "rounds a number to two decimals", "finds the largest of three numbers",
    "prints numbers from 1 to 100 with FizzBuzz", "counts down from n to zero",
    "checks if a number is positive, negative or zero",
)  # fmt: skip

SUBJECTS = (
    "photosynthesis", "gravity", "inflation", "the water cycle", "a black hole", "electricity", "the internet",
    "machine learning", "a neural network", "democracy", "evolution", "DNA", "vaccines", "volcanoes", "earthquakes",
    "rainbows", "climate change", "the moon", "the solar system", "atoms", "recycling", "budgeting", "meditation",
    "good sleep", "healthy food", "teamwork", "time management", "writing a letter", "learning a language", "chess",
    "football", "the piano", "the Roman Empire", "the French Revolution", "the Renaissance", "the printing press",
    "the steam engine", "a database", "an operating system", "a compiler", "version control", "encryption",
    "a web browser", "cloud computing", "an API", "unit testing", "recursion", "a hash table",
    "object oriented programming", "a linked list", "the stock market", "supply and demand", "insurance", "a mortgage",
    "taxes", "the heart", "the brain", "the lungs", "muscles", "bones", "bees", "whales", "elephants", "birds", "trees",
    "oceans", "deserts", "rivers", "mountains", "clouds", "wind", "fire", "steel", "glass", "paper", "coffee", "tea",
    "bread", "cheese", "chocolate", "music", "painting", "poetry", "theatre", "cinema", "photography", "bicycles",
    "cars", "trains", "airplanes", "rockets", "satellites", "telescopes", "microscopes", "clocks", "maps",
)  # fmt: skip

"""The texts of the tiny checkpoints: the released chat template, and what their tokenizers learn from."""

CHAT_TEMPLATE = r"""[gMASK]<sop>
{%- for msg in messages %}
    {%- if msg.role == 'system' %}
<|system|>
{{ msg.content }}
    {%- elif msg.role == 'user' %}
<|user|>{{ '\n' }}

        {%- if msg.content is string %}
{{ msg.content }}
        {%- else %}
            {%- for item in msg.content %}
                {%- if item.type == 'video' or 'video' in item %}
<|begin_of_video|><|video|><|end_of_video|>
                {%- elif item.type == 'image' or 'image' in item %}
<|begin_of_image|><|image|><|end_of_image|>
                {%- elif item.type == 'text' %}
{{ item.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
    {%- elif msg.role == 'assistant' %}
        {%- if msg.metadata %}
<|assistant|>{{ msg.metadata }}
{{ msg.content }}
        {%- else %}
<|assistant|>
{{ msg.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
"""chat_template.jinja of GLM-4.1V-9B-Thinking (MIT licence), character for character."""

TRAINING_TEXT = """\
Describe this picture. What is in this picture? What do you see in the image? Describe this video.
The picture shows a cat that sits on a wooden table beside the window. The cat is orange and white, and it looks at
the camera. Behind the cat there is a green plant in a pot, and the light comes from the left side of the room.
The image shows a street in a small town. There are three people on the left, two cars on the right and a red bus in
the middle of the road. One of the people is wearing a blue coat; another one is holding an umbrella, because it is
raining. In the background there is a church with a tall tower and a clock.
The video begins with a rabbit that comes out of its hole under a big tree. Then a butterfly flies over the grass, and
the rabbit looks up, smiles and follows it. At the end of the video an apple falls from the tree.
First, let's look at the picture. It's a photograph of the sea at night. The moon is above the water, and there's a
ship with many lights. I'll count the lights: one, two, three, four, five, six, seven, eight, nine, ten.
Got it, let's think about the question. The user wants to know how many dogs are in the picture. I can see a dog near
the door and another dog under the chair, so there are two dogs. Wait, the one under the chair is a cat. So the answer
is one.
What colour is the house? The house is yellow, and its roof is brown.
What number is written on the sign? The sign says 42.
Where is the ball? The ball is between the box and the lamp, at [120, 348, 260, 512].
Who is in the photo? A woman with long hair and a man with glasses, who are standing in front of a mountain.
When was it taken? It was probably taken in the morning, since the shadows are long.
Why is the child laughing? Because the dog has stolen the bread and is running away with it.
How does the machine work? Water goes in at the top, is heated by the fire below, and leaves as steam through the pipe
on the right. The steam turns the wheel, and the wheel moves the belt. Each turn takes 10 seconds.
Read the text in the image. The text says: "Open from 9 to 17, closed on Sunday. Please ring the bell."
Solve the problem step by step. The triangle has sides 3, 4 and 5, so it has a right angle, and its area is 6.
Compare the two images. Both show the same garden, but in the first image it is summer and in the second it is winter:
the trees have no leaves, the grass is covered with snow, and the birds have gone.
The chart shows the number of visitors for each month of the year. It was lowest in January (1,200) and highest in
August (9,800). After that it went down again, with about 4,000 in November and 3,500 in December.
In the kitchen, somebody is making soup. There are onions, carrots, potatoes and a large spoon on the table. A small
radio is playing. The person turns around, takes the salt from the shelf, and puts some of it into the pot.
Two teams are playing tennis on an indoor court. The player in the white shirt serves, the other player returns the
ball, and the people who are watching turn their heads from side to side.
The painting was made with thick paint. Its colours are bright: red, orange, yellow, green, blue, purple, black, grey.
It is not clear from the picture whether the train is arriving or leaving. Perhaps it is waiting for other trains.
You are a helpful assistant. Please answer the question in a few words. Yes. No. I don't know. Thank you very much!
Hello! How can I help you today? Here is what I found in your picture: nothing unusual, only a very old bicycle that
has been standing against the same wall for years. Someone should repair it and ride through the country again.
描述这张图片。图片里有什么？这是一只猫。描述这个视频。图中有两个人和一条狗。你好！
"""
"""What the tokenizer is learned from, written for this purpose."""

_NUMBERS = " ".join(map(str, range(0, 1000, 10)))
_DIGITS = """
What digit is this? One digit. Two digits. Locate the 7. Which way does it move? It moves. left right up down. Only 7.
3 left, 7 right: 7 right. 3 top, 7 bottom: 3 top. [[1]]
"""
DIGITS_TEXT = TRAINING_TEXT + 30 * f"{_NUMBERS}{_DIGITS}"
"""The same with what is said about digits (`glm4v_jax.tiny.digits`), so often that words and coordinates are tokens."""
